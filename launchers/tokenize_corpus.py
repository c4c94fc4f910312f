"""Tokenize a corpus once, into files that training reads with --train_shards. Needs no memory for the corpus.

python launchers/tokenize_corpus.py --train_file 'corpus/*.jsonl' --tokenizer_name gpt2 --output_dir tokens
"""

from __future__ import annotations

import sys

from pretraining import environment
from pretraining.parser import Parser
from survival.errors import LaunchError


def main(argv: list[str] | None = None) -> int:
    """Tokenize, or verify; returns the exit code."""
    # Imported here: the processes that tokenize import this file too.
    from pretraining import shard_writer, shards
    from pretraining.corpus import CorpusArguments

    environment.quiet(verbose=False)
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
        environment.complain(str(error))
        return 2
    except OSError as error:
        environment.complain(f"{error}. Mend this and start the command again with the same arguments: it goes on.")
        return 4
    except KeyboardInterrupt:
        environment.complain("Interrupted. Start the command again with the same arguments: it goes on.")
        return 130
    for part, files in (("training", index.train), ("validation", index.validation)):
        tokens, documents = sum(file.tokens for file in files), sum(file.documents for file in files)
        environment.say(f"{part}: {tokens} tokens of {documents} documents in {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
