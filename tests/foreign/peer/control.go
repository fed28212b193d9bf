package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/hashicorp/yamux"
	"google.golang.org/protobuf/proto"
	"storj.io/drpc"
	"storj.io/drpc/drpcerr"
	"storj.io/drpc/drpcserver"
	"storj.io/drpc/drpcwire"
)

const tokenHeader = "Coder-Session-Token"

// Messages that wait until a stream takes them.
const waiting = 64

// Deployment is what the control plane is told to be, in a file.
type deployment struct {
	Token      string          `json:"token"`
	User       json.RawMessage `json:"user"`
	Connection json.RawMessage `json:"connection"`
	DerpMap    json.RawMessage `json:"derp_map"`
	Workspaces json.RawMessage `json:"workspaces"`
	Refresh    json.RawMessage `json:"refresh"`
}

type controlPlane struct {
	schema schema
	plan   deployment

	mutex sync.Mutex
	// What is to be sent, by method; the latest stream of a method has it.
	queues map[string]chan proto.Message
	errors map[string]error
	live   map[*link]struct{}
}

// Link is one control connection.
type link struct {
	socket  *websocket.Conn
	session *yamux.Session
}

// Control is a control plane: websocket, yamux, drpc, and what the file and the orders say.
func control(arguments []string) (event, func(order) error, error) {
	flags := flag.NewFlagSet("control", flag.ContinueOnError)
	schemaPath := flags.String("schema", "", "our tailnet.proto")
	plan := flags.String("plan", "", "what the deployment tells")
	if err := flags.Parse(arguments); err != nil {
		return nil, nil, err
	}
	loaded, err := loadSchema(*schemaPath)
	if err != nil {
		return nil, nil, err
	}
	plane := &controlPlane{
		schema: loaded,
		queues: map[string]chan proto.Message{},
		errors: map[string]error{},
		live:   map[*link]struct{}{},
	}
	text, err := os.ReadFile(*plan)
	if err != nil {
		return nil, nil, err
	}
	if err := json.Unmarshal(text, &plane.plan); err != nil {
		return nil, nil, err
	}
	routes := http.NewServeMux()
	routes.HandleFunc("GET /api/v2/buildinfo", plane.tell(json.RawMessage(`{"version":"v2.31.1","external_url":""}`)))
	routes.HandleFunc("GET /api/v2/users/me", plane.guard(plane.tell(plane.plan.User)))
	routes.HandleFunc("GET /api/v2/workspaceagents/connection", plane.guard(plane.tell(plane.plan.Connection)))
	routes.HandleFunc("GET /api/v2/tailnet", plane.guard(plane.tailnet))
	url, err := listen(routes)
	return event{"url": url}, plane.obey, err
}

func (c *controlPlane) tell(what json.RawMessage) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("X-Coder-Build-Version", "v2.31.1")
		w.Write(what)
	}
}

func (c *controlPlane) guard(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		tokens := r.Header.Values(tokenHeader)
		say(event{"event": "request", "path": r.URL.Path, "query": r.URL.Query(), "tokens": len(tokens)})
		if len(tokens) != 1 || tokens[0] != c.plan.Token {
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
			w.WriteHeader(http.StatusUnauthorized)
			fmt.Fprint(w, `{"message":"You are signed out or your session has expired. Please sign in again to continue."}`)
			return
		}
		next(w, r)
	}
}

func (c *controlPlane) tailnet(w http.ResponseWriter, r *http.Request) {
	socket, err := websocket.Accept(w, r, nil)
	if err != nil {
		say(event{"event": "refused", "error": err.Error()})
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := "the session ended"
	session, err := yamux.Server(websocket.NetConn(ctx, socket, websocket.MessageBinary), yamuxConfig())
	if err != nil {
		ended = err.Error()
	} else {
		here := &link{socket, session}
		c.change(func() { c.live[here] = struct{}{} })
		ended = c.serve(ctx, session)
		c.change(func() { delete(c.live, here) })
	}
	say(event{"event": "disconnected", "error": ended})
}

func yamuxConfig() *yamux.Config {
	config := yamux.DefaultConfig()
	config.LogOutput = logs
	return config
}

func (c *controlPlane) serve(ctx context.Context, session *yamux.Session) string {
	for {
		stream, err := session.Accept()
		if err != nil {
			return err.Error()
		}
		go func() {
			here := &transport{plane: c}
			ended := event{"event": "finished"}
			if err := drpcserver.New(here).ServeOne(ctx, &watched{Conn: stream}); err != nil {
				ended["error"] = err.Error()
			}
			ended["rpc"] = here.name
			say(ended)
		}()
	}
}

// Watched is a stream whose frames are looked at on their way: drpc itself takes the bit that marks a packet as
// one that may be ignored on every kind of packet.
type watched struct {
	net.Conn
	unread []byte
}

func (w *watched) Read(into []byte) (int, error) {
	length, err := w.Conn.Read(into)
	w.unread = append(w.unread, into[:length]...)
	for {
		rest, frame, isWhole, broken := drpcwire.ParseFrame(w.unread)
		if !isWhole || broken != nil {
			return length, err
		}
		w.unread = rest
		if frame.Control && frame.Kind != drpcwire.KindCancel {
			say(event{"event": "odd", "frame": frame.String()})
		}
	}
}

// Transport is one stream of yamux, and the call that is made on it.
type transport struct {
	plane *controlPlane
	name  string
}

// HandleRPC is drpc's way to hand over a call.
func (t *transport) HandleRPC(stream drpc.Stream, rpc string) error {
	c, name := t.plane, method(rpc)
	t.name = name
	say(event{"event": "call", "rpc": rpc})
	request, response, err := c.schema.pair(name)
	if err != nil || rpc != path(name) {
		return fmt.Errorf("protocol error: unknown rpc: %q", rpc)
	}
	if err := c.failure(name); err != nil {
		return err
	}
	switch name {
	case "Coordinate":
		return c.coordinate(stream)
	case "StreamDERPMaps":
		return c.streaming(stream, name, request, c.plan.DerpMap)
	case "WorkspaceUpdates":
		return c.streaming(stream, name, request, c.plan.Workspaces)
	case "RefreshResumeToken":
		err = fill(response, c.plan.Refresh)
	}
	if err != nil {
		return err
	}
	if err := c.receive(stream, name, request); err != nil {
		return err
	}
	return stream.MsgSend(response, wire{})
}

func (c *controlPlane) receive(stream drpc.Stream, name string, into proto.Message) error {
	if err := stream.MsgRecv(into, wire{}); err != nil {
		return err
	}
	say(event{"event": "message", "rpc": name, "message": show(into)})
	return nil
}

func (c *controlPlane) coordinate(stream drpc.Stream) error {
	go c.send(stream, "Coordinate", c.queue("Coordinate"))
	for {
		request, _, err := c.schema.pair("Coordinate")
		if err != nil {
			return err
		}
		if err := c.receive(stream, "Coordinate", request); err != nil {
			say(event{"event": "ended", "rpc": "Coordinate", "error": err.Error()})
			return nil
		}
	}
}

func (c *controlPlane) streaming(stream drpc.Stream, name string, request proto.Message, first json.RawMessage) error {
	if err := c.receive(stream, name, request); err != nil {
		return err
	}
	_, response, err := c.schema.pair(name)
	if err != nil {
		return err
	}
	if err := fill(response, first); err != nil {
		return err
	}
	queue := c.queue(name)
	queue <- response
	c.send(stream, name, queue)
	return nil
}

// Queue gives a stream what is ordered from now on.
func (c *controlPlane) queue(name string) chan proto.Message {
	queue := make(chan proto.Message, waiting)
	c.change(func() { c.queues[name] = queue })
	return queue
}

func (c *controlPlane) send(stream drpc.Stream, name string, queue chan proto.Message) {
	for {
		select {
		case message := <-queue:
			if err := stream.MsgSend(message, wire{}); err != nil {
				say(event{"event": "ended", "rpc": name, "error": err.Error()})
				return
			}
		case <-stream.Context().Done():
			return
		}
	}
}

func (c *controlPlane) failure(name string) error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.errors[name]
}

func (c *controlPlane) change(change func()) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	change()
}

func (c *controlPlane) obey(given order) error {
	switch given.Order {
	case "send":
		_, response, err := c.schema.pair(given.RPC)
		if err != nil {
			return err
		}
		if err := fill(response, given.Message); err != nil {
			return err
		}
		c.mutex.Lock()
		defer c.mutex.Unlock()
		if c.queues[given.RPC] == nil {
			return fmt.Errorf("%s was not called", given.RPC)
		}
		c.queues[given.RPC] <- response
	case "fail":
		err := drpcerr.WithCode(fmt.Errorf("%s", given.Text), given.Code)
		c.change(func() { c.errors[given.RPC] = err })
	case "ping":
		for _, each := range c.links() {
			go each.ping()
		}
	case "drop":
		for _, each := range c.links() {
			each.socket.CloseNow()
		}
	case "close":
		for _, each := range c.links() {
			go each.socket.Close(websocket.StatusCode(given.Code), given.Text)
		}
	default:
		return fmt.Errorf("unknown")
	}
	return nil
}

func (c *controlPlane) links() (links []*link) {
	c.change(func() {
		for each := range c.live {
			links = append(links, each)
		}
	})
	return links
}

// Ping asks on both layers whether the other side lives.
func (l *link) ping() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := l.socket.Ping(ctx); err != nil {
		say(event{"event": "pinged", "error": "websocket: " + err.Error()})
		return
	}
	if _, err := l.session.Ping(); err != nil {
		say(event{"event": "pinged", "error": "yamux: " + err.Error()})
		return
	}
	say(event{"event": "pinged"})
}
