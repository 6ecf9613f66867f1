"""The bundled evaluation tasks (`*.jsonl.gz`), how they were drawn, and files of labelled texts as tasks of mteb."""
