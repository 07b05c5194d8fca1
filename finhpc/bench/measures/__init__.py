"""The benchmarks of `finhpc bench`, one file each."""
