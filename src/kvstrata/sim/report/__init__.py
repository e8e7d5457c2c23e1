"""What people see of simulations: tables, sentences, pictures and one page. Runs nothing itself."""
