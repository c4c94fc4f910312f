"""Tokenize a corpus once, into files that training reads with --train_shards. The corpus need not fit in memory.

python launchers/tokenize_corpus.py --train_file 'corpus/*.jsonl' --tokenizer_name gpt2 --output_dir tokens
"""

from __future__ import annotations

import sys

from pretraining.parser import Parser
from survival.errors import LaunchError

from ds_quant.cli.shared import terminal


def main(argv: list[str] | None = None) -> int:
    """Tokenize or verify; returns the exit code."""
    # Imported here because the tokenizing processes also import this file.
    from corpora import shard_writer, shards
    from corpora.corpus import CorpusArguments

    terminal.quiet(verbose=False)
    try:
        parser = Parser(CorpusArguments, allow_abbrev=False, prog="tokenize_corpus.py", description=__doc__)
        (args,) = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
        args.check()
        if args.verify:
            index = shards.load(args.output_dir)
            shards.verify(index)
        else:
            index = shard_writer.write(args)
    except LaunchError as error:
        terminal.complain(str(error))
        return 2
    except OSError as error:
        terminal.complain(f"{error}. Fix this, then run the command again with the same arguments to resume.")
        return 4
    except KeyboardInterrupt:
        terminal.complain("Interrupted. Run the command again with the same arguments to resume.")
        return 130
    for part, files in (("training", index.train), ("validation", index.validation)):
        tokens, documents = sum(file.tokens for file in files), sum(file.documents for file in files)
        terminal.say(f"{part}: {tokens} tokens of {documents} documents in {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
