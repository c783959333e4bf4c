from coprune.cli import main

main()
