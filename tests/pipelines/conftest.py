"""What the tests of the pipelines share."""

import pytest

from tar_hf.pipelines.pipeline_tar import TarPipeline


@pytest.fixture(scope="module")
def pipe(tar_repo):
    """The golden system: published/llm with ta_tok and ar_dtok_64px."""
    return TarPipeline.from_pretrained(tar_repo)


@pytest.fixture(scope="module")
def picture(noise):
    return noise
