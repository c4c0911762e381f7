"""
The operations of a buffer, one module per subject: functions of a `Transaction`.

Their arguments were checked by `arguments`. One operation calls another with the same transaction.
"""
