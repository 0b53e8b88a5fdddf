"For whoever regenerates the tables: runs and records, scheduling, tables, audit, benchmark, report page."
