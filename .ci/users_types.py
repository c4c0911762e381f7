"""
The types as users meet them: the code of the documents and a sample service, under mypy and pyright, both strict.

`users_types.py` checks them with the tools of the Python that runs it.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

DOCUMENTS = {
    "readme": Path("README.md"),
    "reference": Path("src/kkt_buffer/README.md"),
    "migrations": Path("migrations/README.md"),
    "postgresql": Path("src/kkt_buffer/postgresql/README.md"),
}
SERVICE = Path("tests/service.py")


def main() -> int:
    """Write the blocks of each document into one program, as `tests/test_readme.py` runs them, and check it."""
    bin_folder = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        programs = []
        for name, document in DOCUMENTS.items():
            program = Path(folder) / f"{name}.py"
            program.write_text("\n".join(re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)))
            programs.append(program)
        service = Path(folder) / "service.py"
        service.write_text(SERVICE.read_text())
        config = Path(folder) / "pyrightconfig.json"
        config.write_text('{"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": true}')
        commands = (
            [bin_folder / "mypy", "--strict", "--config-file=", "--no-incremental", *programs, service],
            [bin_folder / "pyright", "--pythonpath", sys.executable, "--project", config],
        )
        return max(subprocess.run(command, check=False).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
