"""A receipt in plain Python: what the database should say of it."""

from dataclasses import dataclass


@dataclass
class Model:
    """What one receipt should be."""

    number: int
    created: int
    status: str = "pending"
    attempts: int = 0
    token: str | None = None
    taken: int = 0
    expires: int = 0
    due: int = 0
    server_time: int | None = None
    open_letter: bool = False
    resolved: bool = False
    events: tuple[str, ...] = ("receipt_added",)

    def tell(self, *kinds):
        self.events += kinds

    def free(self, status):
        self.status, self.token = status, None

    def fail(self):
        self.free("failed")
        self.due, self.open_letter, self.resolved = 0, True, False
        self.tell("receipt_failed")

    def sync(self, server_time):
        if self.status != "synced":
            self.free("synced")
            self.server_time, self.open_letter = server_time, False
            self.due = 0
            self.tell("receipt_synced")
