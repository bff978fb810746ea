"""The two forms a listening test is given out in: our own offline page, and a webMUSHRA configuration."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from ruamel.yaml import YAML

from mamtra_ray.artifacts import write_output
from mamtra_ray.listening_test.opinion_scores import SCALE

TEMPLATE = "template.html"
QUESTION = "How natural does this speech sound?"


PAGE = "test.html"


def write_test_page(folder: Path, test_id: str, files: Mapping[str, Path], clips_per_listener: int) -> None:
    """One HTML file with all clips in it; it knows their meaningless names only."""
    loader = PackageLoader("mamtra_ray.listening_test", "")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    sounds = {clip: base64.b64encode(file.read_bytes()).decode("ascii") for clip, file in files.items()}
    page = environment.get_template(TEMPLATE).render(
        test={"test_id": test_id, "clips_per_listener": clips_per_listener, "sounds": sounds},
        clips_per_listener=clips_per_listener,
        question=QUESTION,
        scale=SCALE,
    )
    write_output(folder, PAGE, lambda path: path.write_text(page, encoding="utf-8"))


def write_webmushra(folder: Path, test_id: str, files: Mapping[str, Path], clips_per_listener: int) -> None:
    """``webmushra/configs/`` to copy into a webMUSHRA checkout.

    A likert_single_stimulus page, which shuffles its stimuli.

    The listener's name is asked for at the end: without it the results could not be told apart by listener.
    """
    resources = Path("configs") / "resources" / test_id
    for clip, file in files.items():
        name = Path("webmushra") / resources / f"{clip}.wav"
        write_output(folder, str(name), partial(shutil.copyfile, file))
    content = {
        "testname": "Naturalness of speech",
        "testId": test_id,
        "bufferSize": 2048,
        "stopOnErrors": True,
        "showButtonPreviousPage": False,
        "remoteService": "service/write.php",
        "pages": [
            {"type": "generic", "id": "introduction", "name": "Naturalness of speech", "content": QUESTION},
            {
                "type": "likert_single_stimulus",
                "id": "naturalness",
                "name": "Naturalness",
                "content": QUESTION,
                "mustRate": True,
                "mustPlayback": "ended",
                "maxStimuli": clips_per_listener,
                "stimuli": {clip: (resources / f"{clip}.wav").as_posix() for clip in files},
                "response": [{"value": score, "label": f"{score} {name}"} for score, name in SCALE],
            },
            {
                "type": "finish",
                "name": "Thank you",
                "content": "Thank you for listening.",
                "showResults": False,
                "writeResults": True,
                "questionnaire": [
                    {"type": "text", "label": "Your name or a pseudonym", "name": "listener", "optional": False}
                ],
            },
        ],
    }
    text, yaml = io.StringIO(), YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(content, text)
    config = text.getvalue()
    config_name = f"webmushra/configs/{test_id}.yaml"
    write_output(folder, config_name, lambda path: path.write_text(config, encoding="utf-8"))
