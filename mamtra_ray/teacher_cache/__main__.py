"""Verb ``teacher_cache``: compute the teacher's outputs once."""

from __future__ import annotations

import sys

from mamtra_ray.config.command_line import verb_parser
from mamtra_ray.errors import exit_code_2_on_input_error
from mamtra_ray.run.open_run import open_run


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = verb_parser(
        "teacher_cache",
        "Run the teacher over the corpus once and keep its outputs, where every other verb looks for them "
        "(cache.location, a folder or a URI).",
    )
    parser.add_argument("--repair", action="store_true", help="compute damaged or missing shards again")
    options = parser.parse_intermixed_args(arguments)
    run = open_run(options.space, options.run, options.overrides)
    if options.dry_run:
        from mamtra_ray.run.checks import check_inputs
        from mamtra_ray.teacher_cache.plan import cache_plan

        print(cache_plan(run.config, check_inputs(run.config, speech=False)))
        return 0

    from mamtra_ray.run.session import start_session
    from mamtra_ray.teacher_cache.manifest import read_cache_manifest
    from mamtra_ray.teacher_cache.phase import cache_location, make_cache
    from mamtra_ray.teacher_cache.storage import Storage

    session = start_session(run, ("cache",), options.address)
    make_cache(session, repair=options.repair)
    location = cache_location(session)
    manifest = read_cache_manifest(Storage.of(location))
    assert manifest is not None
    tokens = sum(manifest.speech_tokens(split) for split in ("train", "validation"))
    print(
        f"{location}: {len(manifest.shards)} shards, {tokens:,} speech tokens, {manifest.num_bytes / 1e6:,.1f} MB, "
        f"{manifest.bytes_per_token:,.1f} bytes per position, verified"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
