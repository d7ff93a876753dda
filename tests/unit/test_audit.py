"""The audit of what is installed: a registry that cannot tell must not pass for one that found
nothing.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[2] / ".ci" / "audit.py"


@pytest.fixture
def audit():
    spec = importlib.util.spec_from_file_location("ci_audit", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def registry(tmp_path: Path, known: dict[str, list], body: str = "") -> str:
    """A stand-in for pip-audit that knows these flaws and skips every other package."""
    path = tmp_path / "pip-audit"
    path.write_text(
        f"#!{sys.executable}\nimport json, sys, time\n{body}\nknown = {known!r}\npackages = []\n"
        "for line in open(sys.argv[sys.argv.index('-r') + 1]).read().split():\n"
        "    name, _, version = line.partition('==')\n"
        "    about = {'vulns': known[line]} if line in known else {'skip_reason': 'not found'}\n"
        "    packages.append({'name': name, 'version': version, **about})\n"
        "print(json.dumps({'dependencies': packages}))\n"
    )
    path.chmod(0o755)
    return str(path)


FLAW = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["9.0.1"]}
CANARY = {"pillow==9.0.0": [FLAW]}


def test_known_flaws_are_told_and_may_be_ignored_with_a_reason(tmp_path, audit):
    locked = audit.locked_versions("Py_Yaml==1.0\ntorch==2.11.0+cpu\n")
    assert locked == {"py-yaml": "1.0", "torch": "2.11.0"}
    found = registry(tmp_path, CANARY | {"torch==2.11.0": [FLAW], "py-yaml==1.0": []})
    assert audit.audit(found, locked) == (["torch 2.11.0: PYSEC-1, mended in 9.0.1"], "")
    audit.IGNORED["CVE-1"] = ("not called here", "2026-11-29")
    assert audit.audit(found, locked) == ([], "")


@pytest.mark.parametrize(
    ("known", "body", "seconds", "words"),
    [
        ({}, "", 60, "does not know"),
        ({"pillow==9.0.0": []}, "", 60, "does not know"),
        (CANARY, "time.sleep(60)", 1, "no answer within 1 s"),
        (CANARY, "sys.exit('no such host')", 60, "no such host"),
    ],
)
def test_who_cannot_tell_has_not_audited(tmp_path, audit, known, body, seconds, words):
    asked = registry(tmp_path, known, body)
    flaws, unaudited = audit.audit(asked, {"torch": "2.11.0"}, seconds)
    assert not flaws and words in unaudited and unaudited.startswith("nothing")


def test_what_was_skipped_is_named(tmp_path, audit):
    found = registry(tmp_path, CANARY | {"torch==2.11.0": []})
    assert audit.audit(found, {"torch": "2.11.0", "own": "1"}) == ([], "own")


def test_a_bill_that_lacks_something_fails(tmp_path, audit, capsys):
    names = ["torch", *(f"p{i}" for i in range(40))]
    (tmp_path / "locked.txt").write_text("".join(f"{n}==1.0\n" for n in names))
    for left_out, code in ((0, 0), (1, 1)):
        parts = [{"name": n, "version": "1.0"} for n in names[left_out:]]
        bill = {"bomFormat": "CycloneDX", "components": parts}
        (tmp_path / "sbom.json").write_text(json.dumps(bill))
        files = str(tmp_path / "sbom.json"), str(tmp_path / "locked.txt")
        assert audit.main(registry(tmp_path, {}), *files) == code
        assert ("torch" in capsys.readouterr().out) == bool(left_out)
    with pytest.raises(ValueError, match="fixed version"):
        audit.locked_versions("torch @ file:///somewhere")
