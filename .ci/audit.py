"""Audit of the installed packages: `python .ci/audit.py PIP_AUDIT SBOM.json LOCKED.txt`.

The bill of materials has to name everything that is locked. Known vulnerabilities are asked of the
registry; if it cannot be reached, or does not report one that is known to exist, the audit says so
and counts nothing as audited.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

# A version with published vulnerabilities: an answer that it has none is worth nothing.
KNOWN_FLAWED = "pillow==9.0.0"
SECONDS = 20
# Vulnerabilities that do not concern us: number -> (why, since when), reviewed after a year.
IGNORED: dict[str, tuple[str, str]] = {}


def locked_versions(text: str) -> dict[str, str]:
    """Name -> version of pip freeze's lines, in lower case, without local parts such as `+cpu`.

    Raises:
        ValueError: a line is anything else, so that its flaws could not be asked for.
    """
    found = {}
    for line in filter(str.strip, text.splitlines()):
        name, equals, version = line.strip().partition("==")
        if not equals:
            raise ValueError(f"not a fixed version: {line}")
        found[normal(name)] = version.partition("+")[0]
    return found


def normal(name: str) -> str:
    """A package's name as registries compare it."""
    return name.lower().replace("_", "-").replace(".", "-")


def missing_components(bill: dict, locked: dict[str, str]) -> list[str]:
    """What is locked and not in a CycloneDX bill of materials with this version."""
    if bill.get("bomFormat") != "CycloneDX":
        raise ValueError("not a CycloneDX bill of materials")
    parts = {
        (normal(c["name"]), c.get("version", "").partition("+")[0]) for c in bill["components"]
    }
    return sorted(name for name, version in locked.items() if (name, version) not in parts)


def ask(pip_audit: str, requirements: str, seconds: float) -> list[dict]:
    """pip-audit's answer for fixed versions: per package `vulns`, or a `skip_reason`.

    Raises:
        RuntimeError: no answer, in so many words.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requirements.txt"
        path.write_text(requirements + "\n")
        options = [
            "--no-deps",
            "--disable-pip",
            "--progress-spinner",
            "off",
            "--timeout",
            "10",
            "-f",
            "json",
            "-r",
            str(path),
        ]
        try:
            done = subprocess.run(
                [pip_audit, *options], capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"no answer within {seconds:g} s") from error
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError) as error:
        raise RuntimeError((done.stderr.strip() or "no answer").splitlines()[-1][:300]) from error


def audit(
    pip_audit: str, locked: dict[str, str], seconds: float = SECONDS
) -> tuple[list[str], str]:
    """The flaws found, as lines, and what could not be audited, as one line ("" if everything was).

    The registry has `seconds` to tell of the known flaw, and three times that for all packages.
    """
    try:
        canary = ask(pip_audit, KNOWN_FLAWED, seconds)
        if not any(package.get("vulns") for package in canary):
            return [], f"nothing: who was asked does not know that {KNOWN_FLAWED} is flawed"
        packages = ask(pip_audit, "\n".join(f"{n}=={v}" for n, v in locked.items()), 3 * seconds)
    except RuntimeError as error:
        return [], f"nothing: {error}"
    flaws = [
        f"{package['name']} {package['version']}: {flaw['id']}, mended in "
        f"{', '.join(flaw['fix_versions']) or 'none'}"
        for package in packages
        for flaw in package.get("vulns", [])
        if not {flaw["id"], *flaw.get("aliases", [])} & IGNORED.keys()
    ]
    audited = {normal(package["name"]) for package in packages if "vulns" in package}
    return flaws, ", ".join(sorted(locked.keys() - audited))


def main(pip_audit: str, bill: str, locked_file: str) -> int:
    """The command; 1 if the bill is incomplete or a flaw is known."""
    locked = locked_versions(Path(locked_file).read_text())
    parts = json.loads(Path(bill).read_text())
    missing = missing_components(parts, locked)
    print(
        f"bill of materials: {len(parts['components'])} components, {len(locked)} locked versions"
    )
    if missing or len(locked) < 30 or "torch" not in locked:
        print(f"the bill of materials is incomplete: {', '.join(missing) or 'too few components'}")
        return 1
    flaws, unaudited = audit(pip_audit, locked)
    print("\n".join(f"known flaw: {flaw}" for flaw in flaws) or "known flaws: none found")
    if unaudited:
        print(f"not audited: {unaudited}")
    return bool(flaws)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
