"""``vmm top``: a machine as it runs, on a terminal.

    text.py     samples as text, without a terminal
    app.py      the screen (Textual), its keys, and the thread that samples
    widgets.py  its parts
    ask.py      a question on the screen

Needs the extra ``top`` (Textual). Like the command line it imports consumers and below.
"""
