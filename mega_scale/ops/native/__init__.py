"""What is compiled C++ on a CPU: sources, and the library made of them."""
