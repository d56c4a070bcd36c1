"""The values of each run, one file per run, with the reasons for them."""
