"""Other servers of the distribution, which are run as PostgreSQL is."""

import shutil
import subprocess

from server_guard import kill_all
from servers import Server, installed


def are_installed(*programs, packages):
    """Whether these programs are here, or could be installed."""
    return bool(installed(lambda: all(map(shutil.which, programs)), *packages))


class Program(Server):
    """Any other server that is run like PostgreSQL: with a port and a folder of its own, and a guard."""

    def launch(self, *command):
        """Start it; everything that it starts is in its folder or below."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self.account,
            )

    def kill(self):
        kill_all(str(self.folder))
        self.process.wait()
