"""Looking into a quantized run: what each analysis of arXiv 2407.11722 measures, on a checkpoint or while training.

Begin with `measurement` (the record of every analysis) and `recorder` (what watches linear layers, by `hooks`). Each
analysis is a module of its name: `outliers`, `moments`, `sharpness`, ... `collector` takes looks inside training;
`figures`, `sentences` and `html` show what was found.
"""
