"""Verb ``align``: train one Mamba mixer per layer to its attention."""

from __future__ import annotations

import sys

from mamtra_ray.config.command_line import verb_parser
from mamtra_ray.errors import InputError, exit_code_2_on_input_error
from mamtra_ray.run.open_run import open_run


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = verb_parser("align", "One Mamba mixer per layer learns its attention's output, all layers in one pass.")
    options = parser.parse_intermixed_args(arguments)
    run = open_run(options.space, options.run, options.overrides)
    config = run.config
    if config.student.initialization != "aligned":
        raise InputError(
            f"student.initialization is {config.student.initialization}: nothing to align (set it to aligned)"
        )
    if options.dry_run:
        from mamtra_ray.run.checks import check_inputs

        check_inputs(config, speech=False)
        workers, where = config.align.workers, run.folder.parent / "shared"
        print(f"align: {config.align.tokens:,} tokens on {workers} worker(s), into {where}")
        return 0

    from mamtra_ray.align.mixer_library import error_table, read_library_manifest
    from mamtra_ray.align.phase import make_library
    from mamtra_ray.run.session import start_session
    from mamtra_ray.teacher_cache.phase import make_cache

    session = start_session(run, ("cache", "align"), options.address)
    library = make_library(session, *make_cache(session))
    assert library is not None
    manifest = read_library_manifest(library)
    print(error_table(manifest))
    print(f"\n{manifest.tokens:,} tokens in {manifest.seconds:.0f} s, {library}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
