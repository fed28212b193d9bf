package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"go4.org/mem"
	"tailscale.com/derp"
	"tailscale.com/derp/derphttp"
	"tailscale.com/disco"
	"tailscale.com/envknob"
	"tailscale.com/net/netmon"
	"tailscale.com/types/key"
)

// What a ping over the relay is seen to come from.
var relayAddress = netip.MustParseAddr("127.3.3.40")

const (
	connectLimit = 30 * time.Second
	redialPause  = 50 * time.Millisecond
	largestUDP   = 64 << 10
)

type relayNode struct {
	private key.NodePrivate
	disco   key.DiscoPrivate
	client  *derphttp.Client
	region  uint16

	mutex sync.Mutex
	known map[key.NodePublic]key.DiscoPublic
	// Where packets that are not disco go, and come from.
	bridge net.Conn
}

// Node is a peer at a relay: it passes packets, and speaks disco with those it knows.
func node(arguments []string) (event, func(order) error, error) {
	flags := flag.NewFlagSet("node", flag.ContinueOnError)
	url := flags.String("relay", "", "URL of the relay, with /derp")
	region := flags.Uint("region", 999, "number of the relay's region")
	private := flags.String("private", "", "the node key to have, 64 hexadecimal digits; a new one if empty")
	byWebsocket := flags.Bool("websocket", false, "reach the relay by websocket")
	if err := flags.Parse(arguments); err != nil {
		return nil, nil, err
	}
	if *byWebsocket {
		// Only a build with the tag ts_debug_websockets looks at it.
		envknob.Setenv("TS_DEBUG_DERP_WS_CLIENT", "true")
	}
	n := &relayNode{
		private: key.NewNode(),
		disco:   key.NewDisco(),
		region:  uint16(*region),
		known:   map[key.NodePublic]key.DiscoPublic{},
	}
	var err error
	if *private != "" {
		if n.private, err = key.ParseNodePrivateUntyped(mem.S(*private)); err != nil {
			return nil, nil, err
		}
	}
	n.client, err = derphttp.NewClient(n.private, *url, logf, netmon.NewStatic())
	if err != nil {
		return nil, nil, err
	}
	n.client.SetCanAckPings(true)
	n.client.SetURLDialer(new(net.Dialer).DialContext)
	ctx, cancel := context.WithTimeout(context.Background(), connectLimit)
	defer cancel()
	if err := n.client.Connect(ctx); err != nil {
		return nil, nil, err
	}
	go n.receive()
	binary, err := n.private.Public().MarshalBinary()
	return event{
		"node":        n.private.Public().String(),
		"node_binary": binary,
		"disco":       n.disco.Public().String(),
		"relay":       n.client.ServerPublicKey().String(),
	}, n.obey, err
}

func (n *relayNode) receive() {
	for {
		message, err := n.client.Recv()
		if errors.Is(err, derphttp.ErrClientClosed) {
			return
		}
		if err != nil {
			say(event{"event": "lost", "error": err.Error()})
			time.Sleep(redialPause)
			continue
		}
		switch message := message.(type) {
		case derp.ReceivedPacket:
			n.packet(message)
		case derp.PeerGoneMessage:
			say(event{"event": "gone", "node": message.Peer.String(), "reason": message.Reason})
		case derp.HealthMessage:
			say(event{"event": "health", "problem": message.Problem})
		case derp.ServerRestartingMessage:
			say(event{"event": "restarting", "in": message.ReconnectIn.String(), "for": message.TryFor.String()})
		case derp.PingMessage:
			if err := n.client.SendPong(message); err != nil {
				say(event{"event": "lost", "error": err.Error()})
			}
			say(event{"event": "relay_ping"})
		case derp.ServerInfoMessage:
			say(event{"event": "server_info"})
		case derp.KeepAliveMessage:
			say(event{"event": "keep_alive"})
		}
	}
}

func (n *relayNode) packet(packet derp.ReceivedPacket) {
	from := packet.Source.String()
	source, isDisco := disco.Source(packet.Data)
	if !isDisco {
		if bridge := n.bridged(); bridge != nil {
			bridge.Write(packet.Data)
			return
		}
		say(event{"event": "packet", "from": from, "bytes": packet.Data})
		return
	}
	message, err := n.open(packet.Source, key.DiscoPublicFromRaw32(mem.B(source)), packet.Data)
	if err != nil {
		say(event{"event": "refused", "from": from, "error": err.Error()})
		return
	}
	switch message := message.(type) {
	case *disco.Ping:
		say(event{"event": "ping", "from": from, "node": message.NodeKey.String(), "padding": message.Padding,
			"transaction": message.TxID[:], "length": len(packet.Data)})
		src := netip.AddrPortFrom(relayAddress, n.region)
		if err := n.seal(packet.Source, &disco.Pong{TxID: message.TxID, Src: src}); err != nil {
			say(event{"event": "refused", "from": from, "error": err.Error()})
		}
	case *disco.Pong:
		say(event{"event": "pong", "from": from, "src": message.Src.String(), "transaction": message.TxID[:],
			"length": len(packet.Data)})
	case *disco.CallMeMaybe:
		say(event{"event": "call_me_maybe", "from": from, "endpoints": message.MyNumber})
	default:
		say(event{"event": "refused", "from": from, "error": fmt.Sprintf("%T", message)})
	}
}

func (n *relayNode) open(from key.NodePublic, source key.DiscoPublic, packet []byte) (disco.Message, error) {
	if known := n.shared(from); known == nil || *known != source {
		return nil, fmt.Errorf("a disco key that is not known")
	}
	boxed := packet[len(disco.Magic)+key.DiscoPublicRawLen:]
	opened, isOpen := n.disco.Shared(source).Open(boxed)
	if !isOpen {
		return nil, fmt.Errorf("a box that does not open")
	}
	return disco.Parse(opened)
}

func (n *relayNode) seal(to key.NodePublic, message disco.Message) error {
	known := n.shared(to)
	if known == nil {
		return fmt.Errorf("%v is not known", to)
	}
	own := n.disco.Public().Raw32()
	packet := append([]byte(disco.Magic), own[:]...)
	packet = append(packet, n.disco.Shared(*known).Seal(message.AppendMarshal(nil))...)
	return n.client.Send(to, packet)
}

func (n *relayNode) shared(with key.NodePublic) *key.DiscoPublic {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	if known, isKnown := n.known[with]; isKnown {
		return &known
	}
	return nil
}

func (n *relayNode) bridged() net.Conn {
	n.mutex.Lock()
	defer n.mutex.Unlock()
	return n.bridge
}

func (n *relayNode) obey(given order) error {
	var to key.NodePublic
	if given.Node != "" {
		if err := to.UnmarshalText([]byte(given.Node)); err != nil {
			return err
		}
	}
	switch given.Order {
	case "know":
		var its key.DiscoPublic
		if err := its.UnmarshalText([]byte(given.Disco)); err != nil {
			return err
		}
		n.mutex.Lock()
		defer n.mutex.Unlock()
		n.known[to] = its
	case "send":
		return n.client.Send(to, given.Bytes)
	case "prefer":
		n.client.NotePreferred(given.Preferred)
	case "relay_ping":
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), connectLimit)
			defer cancel()
			answer := event{"event": "relay_pong"}
			if err := n.client.Ping(ctx); err != nil {
				answer["error"] = err.Error()
			}
			say(answer)
		}()
	case "ping":
		ping := &disco.Ping{NodeKey: n.private.Public(), Padding: given.Padding}
		copy(ping.TxID[:], given.Bytes)
		return n.seal(to, ping)
	case "call_me_maybe":
		call := new(disco.CallMeMaybe)
		for _, text := range given.Endpoints {
			endpoint, err := netip.ParseAddrPort(text)
			if err != nil {
				return err
			}
			call.MyNumber = append(call.MyNumber, endpoint)
		}
		return n.seal(to, call)
	case "bridge":
		return n.connect(given.Address, to)
	default:
		return fmt.Errorf("unknown")
	}
	return nil
}

// Connect joins a node at the relay with a UDP peer here.
func (n *relayNode) connect(address string, to key.NodePublic) error {
	bridge, err := net.Dial("udp", address)
	if err != nil {
		return err
	}
	n.mutex.Lock()
	n.bridge = bridge
	n.mutex.Unlock()
	go func() {
		buffer := make([]byte, largestUDP)
		for {
			length, err := bridge.Read(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			// A port that nobody has yet is told as an error; the next may go through.
			if err == nil {
				err = n.client.Send(to, buffer[:length])
			}
			if err != nil {
				say(event{"event": "refused", "error": err.Error()})
			}
		}
	}()
	return nil
}
