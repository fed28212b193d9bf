package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"

	"github.com/coder/websocket"
	"github.com/hashicorp/yamux"
	"google.golang.org/protobuf/proto"
	"storj.io/drpc"
	"storj.io/drpc/drpcconn"
	"storj.io/drpc/drpcerr"
)

type controlCaller struct {
	schema  schema
	link    link
	streams map[string]drpc.Stream
}

// ControlClient is a client of a control plane: a stream of yamux for each call.
func controlClient(arguments []string) (event, func(order) error, error) {
	flags := flag.NewFlagSet("control-client", flag.ContinueOnError)
	schemaPath := flags.String("schema", "", "our tailnet.proto")
	url := flags.String("url", "", "of the deployment")
	token := flags.String("token", "", "to show")
	query := flags.String("query", "version=2.3", "of the handshake")
	if err := flags.Parse(arguments); err != nil {
		return nil, nil, err
	}
	loaded, err := loadSchema(*schemaPath)
	if err != nil {
		return nil, nil, err
	}
	header := http.Header{tokenHeader: {*token}}
	ready := event{}
	for name, path := range map[string]string{
		"build":      "/api/v2/buildinfo",
		"user":       "/api/v2/users/me",
		"connection": "/api/v2/workspaceagents/connection",
	} {
		if ready[name], err = fetch(*url+path, header); err != nil {
			return nil, nil, err
		}
	}
	ctx := context.Background()
	target := *url + "/api/v2/tailnet?" + *query
	socket, answer, err := websocket.Dial(ctx, target, &websocket.DialOptions{HTTPHeader: header})
	if err != nil {
		if answer == nil {
			return nil, nil, err
		}
		body, _ := io.ReadAll(answer.Body)
		return nil, nil, fmt.Errorf("%w: %s", err, body)
	}
	session, err := yamux.Client(websocket.NetConn(ctx, socket, websocket.MessageBinary), yamuxConfig())
	if err != nil {
		return nil, nil, err
	}
	go func() {
		<-session.CloseChan()
		say(event{"event": "disconnected"})
	}()
	caller := &controlCaller{loaded, link{socket, session}, map[string]drpc.Stream{}}
	return ready, caller.obey, nil
}

func fetch(url string, header http.Header) (json.RawMessage, error) {
	request, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	request.Header = header
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, answer.Status, body)
	}
	return body, err
}

func (c *controlCaller) obey(given order) error {
	switch given.Order {
	case "call":
		go c.call(given)
	case "open":
		return c.open(given)
	case "send":
		return c.send(given)
	case "close_stream":
		return c.streams[given.RPC].Close()
	case "ping":
		go c.link.ping()
	case "close":
		return c.link.session.Close()
	default:
		return fmt.Errorf("unknown")
	}
	return nil
}

func (c *controlCaller) call(given order) {
	request, response, err := c.schema.pair(given.RPC)
	if err != nil {
		// A path that nobody serves is asked for with an empty message.
		request, response, _ = c.schema.pair("RefreshResumeToken")
	}
	if err := fill(request, given.Message); err != nil {
		say(event{"event": "failed", "error": err.Error()})
		return
	}
	stream, err := c.link.session.Open()
	if err != nil {
		say(event{"event": "failed", "error": err.Error()})
		return
	}
	conn := drpcconn.New(stream)
	defer conn.Close()
	if err := conn.Invoke(context.Background(), path(given.RPC), wire{}, request, response); err != nil {
		say(event{"event": "ended", "rpc": given.RPC, "error": err.Error(), "code": drpcerr.Code(err)})
		return
	}
	say(event{"event": "message", "rpc": given.RPC, "message": show(response)})
}

func (c *controlCaller) open(given order) error {
	stream, err := c.link.session.Open()
	if err != nil {
		return err
	}
	call, err := drpcconn.New(stream).NewStream(context.Background(), path(given.RPC), wire{})
	if err != nil {
		return err
	}
	c.streams[given.RPC] = call
	if err := c.send(given); err != nil {
		return err
	}
	if given.RPC != "Coordinate" {
		if err := call.CloseSend(); err != nil {
			return err
		}
	}
	go c.follow(given.RPC, call)
	return nil
}

func (c *controlCaller) send(given order) error {
	request, _, err := c.schema.pair(given.RPC)
	if err != nil {
		return err
	}
	if err := fill(request, given.Message); err != nil {
		return err
	}
	return c.streams[given.RPC].MsgSend(request, wire{})
}

func (c *controlCaller) follow(name string, call drpc.Stream) {
	for {
		var response proto.Message
		_, response, _ = c.schema.pair(name)
		if err := call.MsgRecv(response, wire{}); err != nil {
			say(event{"event": "ended", "rpc": name, "error": err.Error(), "code": drpcerr.Code(err)})
			return
		}
		say(event{"event": "message", "rpc": name, "message": show(response)})
	}
}
