// Peer plays what warren talks to, with the libraries that real deployments are made of.
//
// Each role is a subcommand. It says what happens as one JSON object a line on standard output, first that it
// is ready, and takes orders the same way on standard input; when that closes, it ends.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
)

// Orders are long when they hold a whole snapshot.
const maxOrder = 64 << 20

// Event is one line of what is said, and an order one line of what is heard.
type event map[string]any

type order struct {
	Order     string          `json:"order"`
	RPC       string          `json:"rpc"`
	Message   json.RawMessage `json:"message"`
	Code      uint64          `json:"code"`
	Text      string          `json:"text"`
	Node      string          `json:"node"`
	Disco     string          `json:"disco"`
	Address   string          `json:"address"`
	Endpoints []string        `json:"endpoints"`
	Bytes     []byte          `json:"bytes"`
	Padding   int             `json:"padding"`
	Preferred bool            `json:"preferred"`
	Region    int             `json:"region"`
	Addresses []string        `json:"addresses"`
}

// A role gives what it is ready with, and what it does with an order.
type role func(arguments []string) (ready event, obey func(order) error, err error)

var roles = map[string]role{
	"agent":          agent,
	"control":        control,
	"control-client": controlClient,
	"relay":          relay,
	"node":           node,
	"stun":           questions,
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		say(event{"event": "failed", "error": err.Error()})
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) == 0 || roles[arguments[0]] == nil {
		return fmt.Errorf("usage: peer agent|control|control-client|relay|node|stun ARGUMENTS")
	}
	ready, obey, err := roles[arguments[0]](arguments[1:])
	if err != nil {
		return err
	}
	ready["event"] = "ready"
	say(ready)
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, maxOrder)
	for lines.Scan() {
		var given order
		if err := json.Unmarshal(lines.Bytes(), &given); err != nil {
			return fmt.Errorf("order %q: %w", lines.Text(), err)
		}
		if err := obey(given); err != nil {
			return fmt.Errorf("order %q: %w", given.Order, err)
		}
	}
	return lines.Err()
}

var saying sync.Mutex

func say(what event) {
	line, err := json.Marshal(what)
	if err != nil {
		line = fmt.Appendf(nil, `{"event":"failed","error":%q}`, err)
	}
	saying.Lock()
	defer saying.Unlock()
	os.Stdout.Write(append(line, '\n'))
}

// Listen serves HTTP on a free port of the loopback and gives its URL.
func listen(handler http.Handler) (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go http.Serve(listener, handler)
	return "http://" + listener.Addr().String(), nil
}

// Logf tells what a library says, on standard error.
func logf(format string, arguments ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", arguments...)
}

var logs io.Writer = os.Stderr
