"""``vmm report``: one page, or figures for a paper, of what was measured.

    document.py     what a page consists of: sections, figures, tables
    style.py        how figures look: on a page, by day and by night, and on paper
    sources.py      which kind of result a file, folder or machine's name is
    machine.py      a machine's report                  migration.py    a migration's
    prediction.py   vmm predict's                       sweep.py        vmm stress's
    comparison.py   vmm compare's                       workingset.py   a recording of vmm working-set
    events.py       vmm events's
    page.py         the page (page.html is its template)

A kind of result is one file that makes a Section, and a line in sources.py.
"""
