"""Compare the runs of several machines: claims, tables, charts and a report. Imports neither torch nor mlflow.

stats        intervals, ratios and equivalence tests for a few measurements
runs         one finished run: its figures, conditions and taints
groups       which runs are pooled, which of them count, and why the others do not
claims       what may be claimed about one machine against another
costs        what a job costs, from prices, time and power
schema       dataclasses for the results; their fields are the keys of compare.json
context      settings, names and helpers that all tables use
work_rows    one row of a table of a recipe's work
work_tables  the tables of a recipe's work: at the same settings, and at each machine's best
score_table  the table of the score
build        the whole comparison: `compare`
formats      numbers as text
answer       the sentences at the top of a report
cells        the text of every table cell
content      what a report says, section by section
report       Markdown, terminal and JSON
page         HTML, with page.css
charts       which charts a report shows
plots        drawing them with matplotlib
"""
