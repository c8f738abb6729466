// The stand-in for proxies written in Go: Chat Completions in, Responses to the backend, each event decoded
// and turned into a chunk. It is what one writes first and keeps: net/http, encoding/json, structs, a
// keep-alive pool that is large enough, and a flush when nothing more is there to be written, not per event.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

type chatRequest struct {
	Model    string        `json:"model"`
	Messages []chatMessage `json:"messages"`
	Tools    []chatTool    `json:"tools"`
	Stream   bool          `json:"stream"`
}

type chatMessage struct {
	Role       string         `json:"role"`
	Content    string         `json:"content"`
	ToolCallID string         `json:"tool_call_id"`
	ToolCalls  []chatToolCall `json:"tool_calls"`
}

type chatToolCall struct {
	ID       string `json:"id"`
	Function struct {
		Name      string `json:"name"`
		Arguments string `json:"arguments"`
	} `json:"function"`
}

type chatTool struct {
	Function struct {
		Name        string         `json:"name"`
		Description string         `json:"description"`
		Parameters  map[string]any `json:"parameters"`
	} `json:"function"`
}

type responsesRequest struct {
	Model        string          `json:"model"`
	Instructions string          `json:"instructions"`
	Input        []responsesItem `json:"input"`
	Tools        []responsesTool `json:"tools,omitempty"`
	Store        bool            `json:"store"`
	Stream       bool            `json:"stream"`
}

type responsesItem struct {
	Type      string          `json:"type"`
	Role      string          `json:"role,omitempty"`
	Content   []responsesPart `json:"content,omitempty"`
	CallID    string          `json:"call_id,omitempty"`
	Name      string          `json:"name,omitempty"`
	Arguments string          `json:"arguments,omitempty"`
	Output    string          `json:"output,omitempty"`
}

type responsesPart struct {
	Type string `json:"type"`
	Text string `json:"text"`
}

type responsesTool struct {
	Type        string         `json:"type"`
	Name        string         `json:"name"`
	Description string         `json:"description,omitempty"`
	Parameters  map[string]any `json:"parameters,omitempty"`
}

type responsesEvent struct {
	Type     string `json:"type"`
	Delta    string `json:"delta"`
	Response *struct {
		Usage *struct {
			InputTokens  int `json:"input_tokens"`
			OutputTokens int `json:"output_tokens"`
		} `json:"usage"`
	} `json:"response"`
}

type chatChunk struct {
	ID      string       `json:"id"`
	Object  string       `json:"object"`
	Created int64        `json:"created"`
	Model   string       `json:"model"`
	Choices []chatChoice `json:"choices"`
}

type chatChoice struct {
	Index        int       `json:"index"`
	Delta        chatDelta `json:"delta"`
	FinishReason *string   `json:"finish_reason"`
}

type chatDelta struct {
	Role    string `json:"role,omitempty"`
	Content string `json:"content,omitempty"`
}

func translate(asked *chatRequest) *responsesRequest {
	made := &responsesRequest{Model: asked.Model, Stream: true}
	for _, message := range asked.Messages {
		switch message.Role {
		case "system", "developer":
			made.Instructions += message.Content
			continue
		case "tool":
			made.Input = append(made.Input, responsesItem{
				Type: "function_call_output", CallID: message.ToolCallID, Output: message.Content,
			})
			continue
		}
		if message.Content != "" {
			kind := "input_text"
			if message.Role == "assistant" {
				kind = "output_text"
			}
			made.Input = append(made.Input, responsesItem{
				Type: "message", Role: message.Role, Content: []responsesPart{{kind, message.Content}},
			})
		}
		for _, call := range message.ToolCalls {
			made.Input = append(made.Input, responsesItem{
				Type: "function_call", CallID: call.ID, Name: call.Function.Name, Arguments: call.Function.Arguments,
			})
		}
	}
	for _, tool := range asked.Tools {
		made.Tools = append(made.Tools, responsesTool{
			"function", tool.Function.Name, tool.Function.Description, tool.Function.Parameters,
		})
	}
	return made
}

type proxy struct {
	backend string
	client  *http.Client
	serial  atomic.Int64
}

func (p *proxy) chat(w http.ResponseWriter, r *http.Request) {
	var asked chatRequest
	if err := json.NewDecoder(r.Body).Decode(&asked); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	body, err := json.Marshal(translate(&asked))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	request, err := http.NewRequestWithContext(r.Context(), http.MethodPost, p.backend, bytes.NewReader(body))
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	request.Header.Set("Authorization", "Bearer made-up")
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Accept", "text/event-stream")
	answer, err := p.client.Do(request)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		http.Error(w, answer.Status, http.StatusBadGateway)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-cache")
	p.stream(w, answer.Body, asked.Model)
}

func (p *proxy) stream(w http.ResponseWriter, body io.Reader, model string) {
	flusher := w.(http.Flusher)
	chunk := chatChunk{
		ID: fmt.Sprintf("chatcmpl-%024x", p.serial.Add(1)), Object: "chat.completion.chunk",
		Created: time.Now().Unix(), Model: model, Choices: make([]chatChoice, 1),
	}
	send := func(delta chatDelta, finish *string) {
		chunk.Choices[0] = chatChoice{Delta: delta, FinishReason: finish}
		raw, _ := json.Marshal(chunk)
		fmt.Fprintf(w, "data: %s\n\n", raw)
	}
	reader := bufio.NewReaderSize(body, 32*1024)
	for {
		line, err := reader.ReadSlice('\n')
		long := []byte(nil)
		for err == bufio.ErrBufferFull {
			long = append(long, line...)
			line, err = reader.ReadSlice('\n')
		}
		if long != nil {
			line = append(long, line...)
		}
		if err != nil {
			// An answer that was cut must not look like one that ended.
			panic(http.ErrAbortHandler)
		}
		if data, is := bytes.CutPrefix(line, []byte("data: ")); is {
			var event responsesEvent
			if err := json.Unmarshal(data, &event); err != nil {
				panic(http.ErrAbortHandler)
			}
			switch event.Type {
			case "response.created":
				send(chatDelta{Role: "assistant"}, nil)
			case "response.output_text.delta":
				send(chatDelta{Content: event.Delta}, nil)
			case "response.completed":
				stop := "stop"
				send(chatDelta{}, &stop)
				_, _ = io.WriteString(w, "data: [DONE]\n\n")
				// Read to the end, or the connection could not be used again.
				_, _ = io.Copy(io.Discard, reader)
				return
			}
		}
		if reader.Buffered() == 0 {
			flusher.Flush()
		}
	}
}

func main() {
	backend := flag.String("backend", "", "address to which requests go")
	flag.Parse()
	p := &proxy{backend: *backend, client: &http.Client{Transport: &http.Transport{
		MaxIdleConns: 4096, MaxIdleConnsPerHost: 4096, IdleConnTimeout: 90 * time.Second, DisableCompression: true,
	}}}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/chat/completions", p.chat)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// Whoever started us is gone when our stdin ends, however it ended.
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	_ = http.Serve(listener, mux)
}
