"""Where rheap cannot work it says so, in words that help, and the server runs on."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import HERE, Cluster

INSTALL = HERE / "scripts/install.sh"


@pytest.mark.parametrize("version", ["PostgreSQL 14.9", "PostgreSQL 19devel", "EnterpriseDB"])
def test_an_unknown_major_version_is_refused_before_the_build(tmp_path, version):
    fake = tmp_path / "pg_config"
    fake.write_text(f"#!/bin/sh\necho '{version}'\n")
    fake.chmod(0o755)
    done = subprocess.run([INSTALL, fake], capture_output=True, text=True)
    assert done.returncode == 1
    assert "is not supported; rheap knows 15, 16, 17 and 18" in done.stderr


def test_another_platform_is_refused_by_the_compiler():
    """The standard libraries of others are not here to compile for them: the compiler is asked what it would hold for
    true there, and the condition of the error in lib.rs is evaluated with that."""
    source = (HERE.parent / "src/lib.rs").read_text()
    condition, message = source.split("#[cfg(not(all(", 1)[1].split(")))]", 1)
    assert message.lstrip().startswith("compile_error!") and "rheap supports Linux on x86_64 only" in message
    wanted = {part.strip().replace(" = ", "=") for part in condition.split(",")}

    def builds(target):
        listed = subprocess.run(["rustc", "--print", "cfg", "--target", target], capture_output=True, text=True, check=True)
        return wanted <= set(listed.stdout.split("\n"))

    assert builds("x86_64-unknown-linux-gnu")
    for target in ("x86_64-pc-windows-msvc", "x86_64-apple-darwin", "aarch64-apple-darwin", "i686-unknown-linux-gnu",
                   "x86_64-unknown-linux-gnux32", "aarch64-unknown-linux-gnu"):
        assert not builds(target), target


def test_a_build_for_a_server_without_assertions_steps_aside_in_one_with(pg17_control, pg17_cassert):
    """The method table has a member more there, which the server's own check of libraries does not see."""
    library = lambda pg: Path(subprocess.check_output([pg, "--pkglibdir"], text=True).strip())
    plain = library(pg17_cassert) / "rheap_plain.so"
    shutil.copy(library(pg17_control) / "rheap.so", plain)
    try:
        with Cluster(pg17_cassert, preload="") as cluster:
            cluster.sql("CREATE EXTENSION rheap")
            cluster.configure(shared_preload_libraries="rheap_plain")
            cluster.stop()
            cluster.start()
            reason = "rheap was compiled for a server with other debug_assertions"
            assert f"rheap runs without its hooks and records nothing: {reason}" in cluster.log_text()
            assert cluster.sql("SELECT sum(length(md5(g::text))) FROM generate_series(1, 10000) g") == "320000"
            assert cluster.stop() < 10
            assert "TRAP" not in cluster.log_text()
    finally:
        plain.unlink()
