"""Runs of machines become claims, tables, charts and a report. Imports neither torch nor mlflow.

stats        intervals, ratios and equivalence of a few measurements
runs         a run as it is read: figures, conditions, taints
groups       which runs are pooled, which count, and why the others do not
claims       what may be claimed of one machine against another
costs        what the work costs
schema       the comparison as plain values; their fields are the keys of compare.json
context      what the tables share: settings, names, heads of rows, sides of claims
work_rows    the figures of a recipe's work
work_tables  a recipe's work at the same settings, and at each machine's best
score_table  the sustained steps
build        all of it: `compare`
formats      numbers as text
answer       the one to three sentences that open a report
cells        tables as columns of text
report       Markdown, terminal and JSON
page         HTML
charts       the charts of each table
plots        how they are drawn
"""
