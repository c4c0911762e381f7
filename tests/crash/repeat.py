"""One image once more, as a failing test names it: `python -m crash.repeat RECORDING moment MOMENT, seed SEED`."""

import pickle
import sys
from pathlib import Path
from tempfile import mkdtemp

from crash.check import Ledger, judge
from crash.disk import Disk
from crash.images import draw, put


def main(saved, _moment, moment, _seed, seed):
    recording, known = pickle.loads(Path(saved).read_bytes())
    at = int(moment.rstrip(","))
    disk = Disk(recording)
    disk.advance(at)
    image = draw(disk, int(seed.rstrip(":")))
    folder, opened = Path(mkdtemp(prefix="image-")), Path(mkdtemp(prefix="opened-"))
    put(image, folder)
    put(image, opened)
    print(f"the image is {folder}; opened, it is {opened}")
    print(
        *judge(opened / recording.database, *Ledger(recording, known).at(at)) or ["nothing is wrong with it"], sep="\n"
    )


if __name__ == "__main__":
    main(*sys.argv[1:6])
