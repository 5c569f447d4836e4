# What Python sees of datapath/src/lib.rs.
VERSION: str
