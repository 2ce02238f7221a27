"""Model cards of converted repositories, with the metadata that the Hub reads."""

import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

PAPER = "[Vision as a Dialect: Unifying Visual Understanding and Generation via Text-Aligned Representations]\
(https://huggingface.co/papers/2506.18898)"

CARD = """---
{metadata}
---

# {title}

{description}

From the paper {paper}. {origin}

| | |
|---|---|
{table}

## Use

```python
{usage}
```
{note}"""

ORIGINS = {
    True: "Converted from `{source}` with [tar-hf](https://pypi.org/project/tar-hf/) {version}, with results equal to "
    "the original code's.",
    False: "Made with [tar-hf](https://pypi.org/project/tar-hf/) {version}.",
}

# For repositories that carry their code.
TRUST_NOTE = """
With `pip install tar-hf` and `import tar_hf`, `trust_remote_code=True` is not needed.
"""


def write_model_card(
    folder: Path,
    *,
    title: str,
    description: str,
    source: str | None = None,
    repository: str,
    usage: str,
    facts: dict[str, object],
    pipeline_tag: str,
    base_model: str | None,
    tags: tuple[str, ...] = (),
    library_name: str = "transformers",
):
    """
    Writes `README.md`. `facts` become a table; `source` is the name of what was converted, if anything was; `usage` is
    Python that loads `REPO`, which stands for the name of the `repository`.
    """
    from tar_hf import __version__

    metadata = ModelCardData(
        license="apache-2.0",
        library_name=library_name,
        pipeline_tag=pipeline_tag,
        base_model=base_model,
        tags=["tar", *tags],
    )
    ModelCard(
        CARD.format(
            metadata=metadata.to_yaml(),
            title=title,
            description=description,
            paper=PAPER,
            origin=ORIGINS[source is not None].format(source=source, version=__version__),
            table="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
            usage=usage.strip().replace("REPO", json.dumps(repository, ensure_ascii=False)),
            note=TRUST_NOTE if "trust_remote_code" in usage else "",
        )
    ).save(folder / "README.md")
