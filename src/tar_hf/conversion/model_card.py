"""Model cards of converted repositories, with the metadata that the Hub reads."""

import json
import re
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
OURS = "https://pypi.org/project/tar-hf/"  # in every card of `write_model_card`
PART_NOTE = """## Use

A part of the Tar repository that it lies in: `TarPipeline` loads it from there.
"""

ORIGINS = {
    True: f"Converted from `{{source}}` with [tar-hf]({OURS}) {{version}}, with results equal to the original code's.",
    False: f"Made with [tar-hf]({OURS}) {{version}}.",
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


def name_repository(card: str, repository: str) -> str:
    """
    A card whose Python, below "Use", loads `repository` in place of the folder that the card was made for.

    Names with a slash stay, and so does a card that `write_model_card` did not write.
    """
    used = re.search(r"\n## Use\n\n```python\n(.*?)```", card, re.DOTALL)
    if OURS not in card or used is None:
        return card
    quoted = json.dumps(repository, ensure_ascii=False)
    usage = re.sub(r'(from_pretrained\(|model=)"[^"/]+"', lambda found: found[1] + quoted, used[1])
    return card[: used.start(1)] + usage + card[used.end(1) :]


def as_part(card: str) -> str:
    """A card of a repository that has become a part of another, where its Python would find nothing."""
    text, heading, _ = card.partition("## Use\n")
    return text + PART_NOTE if heading and OURS in text else card
