"""The study of the paper's matrix: which runs it has, training them, and the tables made of their figures.

`protocol` has what was fixed before any run: sizes, budgets, seeds, limits of verdicts. `rows` lists what is trained:
controls, the paper's matrix (from `sweeping.paper`, its one table), `repairs` of its components one at a time, and
`combinations` of several, both put together from `sections`. `texts` and `wiki_markup` bring the text. `plan` says
which runs are to be done, `training` does them, `results` keeps their figures in a CSV that is committed, `verdicts`
judges paired gaps, and `tables` and `pictures` turn the CSV into docs/study.md. `smoke` is the same with a few short
runs and limits that were measured.

`commands` has a function for each command, `arguments` their flags, `asked` the runs that they mean. `cluster` does the
runs as jobs of Slurm. Beside the runs, from their `checkpoints`: `post_training` (quantizers put in or taken out after
training), `adapting` (models trained on with quantizers), `isolation` (outliers or sharpness, with what is changed in
`arms` and the layers' `products`), `repeating` (runs done again, on kinds of `processors`). `memory` has peaks of whole
steps, `fits` lines and planes through gaps, `overview` what failed and its best repair.
"""
