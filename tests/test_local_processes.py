"""What is left of a local Ray cluster when its driver is killed."""

import subprocess
import sys

import psutil
import pytest

A_DRIVER = """
import time
from mamtra_ray.runtime.cluster import connect
import ray
connect()
print(ray.init(ignore_reinit_error=True).address_info["session_dir"], flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_nothing_lives_on_but_who_reads_its_logs(tmp_path):
    """Ray's own agents would, for a minute: they try to tell a head that was killed as well."""
    driver = subprocess.Popen(
        [sys.executable, "-c", A_DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    session_folder = driver.stdout.readline().strip()
    reader = subprocess.Popen(["tail", "-f", f"{session_folder}/logs/raylet.out"], stdout=subprocess.DEVNULL)
    try:
        family = psutil.Process(driver.pid).children(recursive=True)
        assert any(process.name().startswith("ray::") for process in family)
        driver.kill()
        _, alive = psutil.wait_procs(family, timeout=30)
        assert alive == []
        assert driver.stderr.read().strip().endswith("the same command goes on where it stopped")
        assert reader.poll() is None
    finally:
        driver.kill()
        reader.kill()
        reader.wait()


@pytest.mark.slow
def test_a_driver_that_ends_by_itself_says_what_it_has_to_say_itself():
    code = "from mamtra_ray.runtime.cluster import connect; connect()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "goes on" not in ended.stderr
