"""The `afbus` command: to run an agent, and to work on a bus by hand.

main.py      the command itself, its exit codes, and how errors are told
argument.py  what is typed: paths, addresses, terms, bodies
output.py    what is printed: lines and tables for people, JSON for programs
protocol.py  what members and masters of ours say to one another, in words
run.py       one command in an event loop: how it begins and ends
node.py      `afbus node`, `afbus status`
bus.py       `afbus bus create`, `afbus join`
talk.py      `afbus send`, `publish`, `listen`, `request`, `serve`
look.py      `afbus list`, `afbus monitor`

Modules that take time to import are imported by the commands that need them, so that `--help` is
quick.
"""
