"""Text to device: documents, tokens, fixed rows, batches.

Read in this order: `sources.py` (where documents come from and which are held out), `tokenizers.py` (text <-> ids),
`packing.py` (documents -> rows of seq_len tokens), `pipeline.py` (rows -> batches on the devices). Questions go another
way to rows: `questions.py` and `labels.py` (their files), `pieces.py` (where an answer begins), `question_rows.py`.

The path of one batch: `load` reads all documents, tokenises them once into one flat array per split and checks it
against the config. `batch_indices(num_rows, batch_size, seed, step)` says which rows step number `step` sees; being a
pure function, it makes the step number the only state of the pipeline: a resumed run, on any number of hosts, sees the
same batches. `host_batch` builds this host's share of those rows, and `train_batches` does both ahead of the training
thread and puts the result on the devices with `sharding.global_batch`.
"""

from adaptive.data.pipeline import Dataset, host_batch, load, row_shapes, train_batches, validation_batches

__all__ = ["Dataset", "host_batch", "load", "row_shapes", "train_batches", "validation_batches"]
