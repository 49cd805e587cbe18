"""The course machine.

manifest.py      reads chapters/chapterNN_*/chapter.toml
source.py        finds a definition in a file, blanks it, puts it back
package.py       the package cut off after chapter N, and the starter of chapter N
imports.py       what a file imports, read without running it

workspace.py     the learner's own package: check, reset, backups
start.py         makes it, or brings it to the next chapter
progress.py      what is green, which hints were read
runner.py        runs a chapter's tests on a package
standing.py      how a task stands by those tests
gate_runner.py   runs many variants of the package in one warm process, for the gates

texts.py         quotes, tables and maps in the chapters' texts
text_checks.py   links, figures and shell lines in them
cli.py           the commands; check_report.py, outline.py and screen.py print
"""
