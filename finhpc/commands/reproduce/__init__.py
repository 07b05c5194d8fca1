"""`finhpc reproduce`: the whole paper at one scale, from the text to the report."""
