"""From text to rows of tokens, in an order that depends only on the seed and the global batch.

    corpus           which files become which shards, for launchers/tokenize_corpus.py; `shard_writer` writes them
    tokenizer        trains a tokenizer, or loads one
    shards           an index of files of tokens, checked by digests, and their rows
    packing          documents into rows of one length
    hub              data sets by their names
    document_stream  documents read part by part, from any position; `streaming` deals them to ranks and packs them
    permutation      the order of an epoch without memory
    loading          what the Trainer reads shards and streams by; a resume continues where the checkpoint was

docs/data.md is the user documentation.
"""
