"""`ouro-vllm bench`: how fast each way of decoding is on this machine, the ways against each other.

Every mode is an engine in a process of its own (`worker`, started by `children`), so that all are up at once and can be
asked in turn (A B A B): what else the machine does hits them alike. Those not asked stand still. `run` conducts,
`figures` makes medians, ratios and the projection out of what was measured, `report` makes tables and the plot of them,
`results` writes what comes out.
"""
