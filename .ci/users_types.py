"""
The types as users meet them: the README's code and a sample service, under mypy and pyright, both strict.

`users_types.py` checks them with the tools of the Python that runs it.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path("README.md")
SERVICE = Path("tests/service.py")


def main() -> int:
    """Write the README's blocks into one program, as `tests/test_readme.py` runs them, and check it."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    bin_folder = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "readme.py"
        program.write_text("\n".join(blocks))
        service = Path(folder) / "service.py"
        service.write_text(SERVICE.read_text())
        config = Path(folder) / "pyrightconfig.json"
        config.write_text('{"typeCheckingMode": "strict", "reportUnnecessaryTypeIgnoreComment": true}')
        commands = (
            [bin_folder / "mypy", "--strict", "--config-file=", "--no-incremental", program, service],
            [bin_folder / "pyright", "--pythonpath", sys.executable, "--project", config],
        )
        return max(subprocess.run(command, check=False).returncode for command in commands)


if __name__ == "__main__":
    sys.exit(main())
