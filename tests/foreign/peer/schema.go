package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/bufbuild/protocompile"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
	"storj.io/drpc"
)

const serviceName = "coder.tailnet.v2.Tailnet"

// Schema is warren's own, compiled at run time: nothing is generated, nothing can go stale.
type schema struct {
	service protoreflect.ServiceDescriptor
}

func loadSchema(path string) (schema, error) {
	folder, name := filepath.Split(path)
	source := &protocompile.SourceResolver{ImportPaths: []string{folder}}
	compiler := protocompile.Compiler{Resolver: protocompile.WithStandardImports(source)}
	files, err := compiler.Compile(context.Background(), name)
	if err != nil {
		return schema{}, err
	}
	found := files[0].FindDescriptorByName(serviceName)
	if found == nil {
		return schema{}, fmt.Errorf("%s has no %s", path, serviceName)
	}
	return schema{found.(protoreflect.ServiceDescriptor)}, nil
}

func path(method string) string { return "/" + serviceName + "/" + method }

// Method is the last part of a call's path.
func method(rpc string) string { return rpc[strings.LastIndexByte(rpc, '/')+1:] }

// Pair makes an empty request and an empty response of a method.
func (s schema) pair(name string) (request, response proto.Message, err error) {
	found := s.service.Methods().ByName(protoreflect.Name(name))
	if found == nil {
		return nil, nil, fmt.Errorf("the schema has no method %q", name)
	}
	return dynamicpb.NewMessage(found.Input()), dynamicpb.NewMessage(found.Output()), nil
}

func fill(message proto.Message, text json.RawMessage) error {
	if len(text) == 0 {
		return nil
	}
	return protojson.Unmarshal(text, message)
}

func show(message proto.Message) json.RawMessage {
	text, err := protojson.Marshal(message)
	if err != nil {
		return json.RawMessage(fmt.Sprintf("%q", err.Error()))
	}
	return text
}

// Wire is how messages travel inside drpc.
type wire struct{}

func (wire) Marshal(message drpc.Message) ([]byte, error) {
	return proto.Marshal(message.(proto.Message))
}

func (wire) Unmarshal(bytes []byte, message drpc.Message) error {
	into := message.(proto.Message)
	if err := proto.Unmarshal(bytes, into); err != nil {
		return err
	}
	if unknown := into.ProtoReflect().GetUnknown(); len(unknown) > 0 {
		return fmt.Errorf("%d bytes of fields that the schema does not have", len(unknown))
	}
	return nil
}
