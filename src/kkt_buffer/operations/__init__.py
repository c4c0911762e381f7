"""
The operations of a buffer, a file for each subject: functions of a `Transaction`.

What a caller hands in was checked before, by `arguments`. One operation calls another with the same transaction.
"""
