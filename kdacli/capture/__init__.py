"""Takes the tensors of a live program's KDA calls: `from kdacli.capture import capture`, or `kda capture`.

sites.py knows where engines call KDA; recorder.py is put in the place of those functions; arguments.py and
taken.py turn a call into a dump; settings.py and bootstrap/ carry all that into the processes of another program, and
journal.py carries back what happened there.
"""

from kdacli.capture.session import capture

__all__ = ["capture"]
