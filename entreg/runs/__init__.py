"""Many runs: each in a directory of its own, run once whoever launches it, and told about while they go on.

- :mod:`entreg.runs.lock`: who does a piece of work, on one machine or on several with a shared file system.
- :mod:`entreg.runs.directory`: what a run leaves beside its record: log, attempts, ``DONE`` or ``FAILED``.
- :mod:`entreg.runs.finished`: what a run has measured before it was killed.
- :mod:`entreg.runs.sweep`: which jobs a command stands for, and what became of them.
- :mod:`entreg.runs.status`: that as a table.

Nothing here knows a launcher: jobs agree through files alone.
"""
