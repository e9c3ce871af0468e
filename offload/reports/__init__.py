"""Reports what a run did and what bound it: as JSON, as a web page, as a trace.

`make_report` (report) collects the figures; `what_bound` (bound) judges them from
`Counts` (counts) and gives `Advice`, which `with_tried_advice` (advice) tests by the
plan. `Recorded` (recorded) holds the timeline. `render` (page) draws the page, and
`trace` (perfetto) writes the trace.
"""
