"""What every test may use: ``small_graphs`` lies beside this file and is imported from all folders below."""
