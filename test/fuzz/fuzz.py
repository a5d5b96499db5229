"""Looks for bytes that a reader of untrusted input does not bear, guided by coverage.

    pip install atheris
    python test/fuzz/fuzz.py TARGET [--minutes 5] [--corpus FOLDER] [--merge]

The targets are in `test/fuzz/fuzz_targets.py`, one per input. Inputs that reach code not reached
before are kept in the corpus folder, `fuzz_out/TARGET` by default, beside what test/data/fuzz has;
one that breaks a promise, takes more than 10 s or 1.5 GB ends the run and lies in `fuzz_out/` under
the name that is printed. --merge adds to test/data/fuzz/TARGET, whence the tests replay them, the
fewest inputs that reach what those there don't.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "test" / "data" / "fuzz"
LONGEST_BYTES = 4096
SECONDS_EACH, MEGABYTES = 10, 1500
# pure Python that decides over the input's way
INSTRUMENTED = ("pi05_ros", "rosbags", "yaml", "json.decoder", "xml.etree")


def arguments_of_libfuzzer(options: argparse.Namespace, corpus: Path) -> list[str]:
    """Its command line; the first folder is the one that is written."""
    kept = KEPT / options.target
    limits = [f"-max_len={LONGEST_BYTES}", f"-timeout={SECONDS_EACH}", f"-rss_limit_mb={MEGABYTES}"]
    artifacts = f"-artifact_prefix={corpus.parent}/{options.target}_"
    if options.merge:
        return ["-set_cover_merge=1", *limits, artifacts, str(kept), str(corpus)]
    seconds = f"-max_total_time={round(60 * options.minutes)}"
    return [seconds, *limits, artifacts, "-print_final_stats=1", str(corpus), str(kept)]


def main(args: Sequence[str] | None = None) -> int:
    import atheris

    sys.path.insert(0, str(ROOT / "test" / "fuzz"))
    import fuzz_checks
    from fuzz_targets import TARGETS

    parser = argparse.ArgumentParser(description="Fuzz a reader of untrusted input.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--corpus", type=Path, help="default: fuzz_out/TARGET")
    parser.add_argument("--merge", action="store_true")
    options, of_libfuzzer = parser.parse_known_args(args)
    corpus = options.corpus or Path("fuzz_out") / options.target
    for place in (corpus, KEPT / options.target):
        place.mkdir(parents=True, exist_ok=True)
    fuzz_checks.places = work = corpus.parent / f"{options.target}_work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        run = TARGETS[options.target]()
    command = work / "again"
    # libFuzzer's merge runs its own program anew, with flags of its own behind the name
    again = shlex.join([sys.executable, str(Path(__file__).resolve()), options.target])
    command.write_text(f'#!/bin/sh\nexec {again} "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    arguments = of_libfuzzer or arguments_of_libfuzzer(options, corpus)
    atheris.Setup([str(command.resolve()), *arguments], run)
    atheris.Fuzz()  # ends the process
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
