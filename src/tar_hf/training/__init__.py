"""Training of every stage with transformers' Trainer, each from one YAML recipe (`tar-hf train STAGE RECIPE`).

`recipe` reads recipes; `rows`, `sources`, `mixture` and `streaming` read data; `pretokenize` turns pictures into codes
beforehand; `trainer` is what the stages share; the other files are one stage each, or a part of one.
"""
