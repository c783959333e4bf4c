from coprune.commands.app import main

main()
