package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() { c := make(chan os.Signal, 1); signal.Notify(c, syscall.SIGTERM, syscall.SIGINT); <-c }
