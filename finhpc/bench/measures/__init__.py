"""What `finhpc bench` can measure, one file each."""
