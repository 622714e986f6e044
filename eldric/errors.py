"""What can go wrong in the services. Each error carries the name of the gRPC code that it becomes.

EldricError
├── InvalidRequest          INVALID_ARGUMENT      a field is missing, of the wrong kind or out of range
├── NotFound                NOT_FOUND             no model, pipeline, node or stage of that name
├── AlreadyExists           ALREADY_EXISTS        the name is taken
│   └── AddressInUse                              another process listens on the port
├── NotEnoughMemory         RESOURCE_EXHAUSTED    a plan or a load does not fit; says what is missing where
├── NotEnoughSpace          RESOURCE_EXHAUSTED    files do not fit on a disk; needed and free bytes are named
├── QueueIsFull             RESOURCE_EXHAUSTED    try again later; `retry_after_s` says when
├── NotReady                FAILED_PRECONDITION   the thing exists, but not in a state for this
│   ├── StaleEpoch                                the caller speaks of an older epoch
│   ├── VersionMismatch                           protocol versions differ; both are named
│   └── NotSupported                              this model cannot do this, however often it is tried
├── Unavailable             UNAVAILABLE           a peer is gone or still loading; retryable
│   ├── PipelineDegraded                          a stage is lost
│   └── Busy                                      too many do this at once; `retry_after_s` says when to come again
├── DataLoss                DATA_LOSS             bytes are not those that were promised
├── Unauthenticated         UNAUTHENTICATED       a token or certificate is missing or wrong
├── PermissionDenied        PERMISSION_DENIED     this caller may not do this
└── DeadlineExceeded        DEADLINE_EXCEEDED     a peer did not answer in time
"""


class EldricError(Exception):
    """Base of everything that the services raise on purpose. `message` is one readable line."""

    status = "INTERNAL"

    @property
    def message(self) -> str:
        return str(self)


class InvalidRequest(EldricError):
    status = "INVALID_ARGUMENT"


class NotFound(EldricError):
    status = "NOT_FOUND"


class AlreadyExists(EldricError):
    status = "ALREADY_EXISTS"


class AddressInUse(AlreadyExists):
    pass


class NotEnoughMemory(EldricError):
    status = "RESOURCE_EXHAUSTED"


class NotEnoughSpace(EldricError):
    status = "RESOURCE_EXHAUSTED"


class QueueIsFull(EldricError):
    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotReady(EldricError):
    status = "FAILED_PRECONDITION"


class StaleEpoch(NotReady):
    pass


class VersionMismatch(NotReady):
    pass


class NotSupported(NotReady):
    pass


class Unavailable(EldricError):
    status = "UNAVAILABLE"


class PipelineDegraded(Unavailable):
    pass


class Busy(Unavailable):
    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DataLoss(EldricError):
    status = "DATA_LOSS"


class Unauthenticated(EldricError):
    status = "UNAUTHENTICATED"


class PermissionDenied(EldricError):
    status = "PERMISSION_DENIED"


class DeadlineExceeded(EldricError):
    status = "DEADLINE_EXCEEDED"
