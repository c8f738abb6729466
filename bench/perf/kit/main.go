// The mock backend and the load generator of `make bench`, in one program.
//
//	kit mock -plan plan.json   plays the Codex backend; prints its port, ends with its stdin
//	kit load                   reads what to do from stdin as JSON, prints what it measured as JSON
//
// Both are one thread around epoll on plain sockets: net/http would cost more than the fastest of
// what is measured here. Nothing but the standard library is used, and nothing leaves 127.0.0.1.
package main

import (
	"fmt"
	"os"
	"runtime/debug"
)

func main() {
	// Garbage is rare and small; collecting it seldom keeps it out of other people's latencies.
	debug.SetGCPercent(1000)
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	var err error
	switch command {
	case "mock":
		err = runMock(os.Args[2:])
	case "load":
		err = runLoad()
	default:
		err = fmt.Errorf("usage: kit mock|load")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "kit:", err)
		os.Exit(1)
	}
}
